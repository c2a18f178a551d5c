"""What was kept of a prompt, as one HTML file: records, their packing, the page."""
