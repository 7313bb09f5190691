"""Ways in for code written for another library: a module for each, which imports nothing of it until called."""
