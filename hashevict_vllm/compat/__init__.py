"""What a KV policy refuses to run with: `rules`, and by machine `device`."""
