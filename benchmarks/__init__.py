"""Speed and memory; see docs/performance.md."""
