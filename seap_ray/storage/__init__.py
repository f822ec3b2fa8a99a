"""Storage: paths, files that are whole or absent, artifacts, locks and the run's folder, on a disk or in a bucket."""
