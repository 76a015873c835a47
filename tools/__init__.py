"""Command-line tools; each module has a `main(argv)` that `pact` calls."""
