"""A traffic report for people: Markdown, an HTML page, several reports side by side."""
