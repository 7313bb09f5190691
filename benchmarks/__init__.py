"""Speed and memory, measured beside the floor (the bare matrix products of the same rows) in the same run."""
