"""Run folders, trainers, pseudo-labels, and the command `train_kd`."""
