"""What a run leaves behind, and how it is shown: progress, metrics, summary, curves, where it stands."""
