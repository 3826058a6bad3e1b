"""What a run shows and leaves behind: progress, metrics, summary and curves."""
