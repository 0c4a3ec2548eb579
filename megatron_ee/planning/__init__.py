"""What a run takes, counted before anything is loaded: work, memory, a balanced layout."""
