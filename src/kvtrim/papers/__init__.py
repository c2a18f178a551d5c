"""What papers report: their figures as data, and the recipes of their tables and figures."""
