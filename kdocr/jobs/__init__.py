"""Many runs: notebooks executed headless, a queue, sweeps, and a listing of what there is."""
