"""The run directory: Parquet datasets, model directories, manifests, atomic commits, resume (docs/architecture.md)."""
