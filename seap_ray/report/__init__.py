"""Report: the results of a run as text for a terminal and as one HTML page with figures."""
