"""Report: a run's files in, tables, charts and one page out."""
