"""What a user sees while a run runs: progress, events, metrics, trackers."""
