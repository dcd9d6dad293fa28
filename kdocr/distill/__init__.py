"""CTC, distillation losses and terms, cached teachers, similarity of features. Knows taps and no network."""
