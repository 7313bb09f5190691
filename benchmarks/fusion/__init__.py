"""Does fusion work? Tiny models, really trained, on skills that a program can judge: `python -m benchmarks.fusion`."""
