"""Plots: one file a family of charts; each makes a section of the report, or none where the run has no files for it."""
