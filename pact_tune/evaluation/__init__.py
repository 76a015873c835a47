"""Evaluation: answers of models to benchmarks, judged, with what is broken kept apart from what is safe; audit; report."""
