"""Experiments: a file that names methods, cases, poison shares and seeds; ordinary commands in folders of their own; one table."""
