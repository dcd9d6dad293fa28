"""Statistics, probes, figures, reports and explorers of finished runs."""
