"""From records to tables: medians, ratios, Markdown; published figures beside measured ones."""
