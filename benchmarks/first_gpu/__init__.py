"""The first minutes with a card: `python -m benchmarks.first_gpu` (`make first-gpu`)."""
