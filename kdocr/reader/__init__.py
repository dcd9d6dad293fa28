"""Read plates without torch; submit, export and describe a reader."""
