"""Pipeline: the path of the data over a Ray cluster, from a config to checkpoints and a table."""
