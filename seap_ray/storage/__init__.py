"""Storage: paths, whole files, locks and the run directory, on a disk or in a bucket."""
