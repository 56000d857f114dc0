"""The benchmark harness: real servers, the relay as a subprocess, peers side by side. `python -m benchmarks --help`."""
