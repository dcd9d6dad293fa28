"""Networks that return their taps, and how they are frozen."""
