"""Plans a run before anything is loaded: work, memory and a balanced layout."""
