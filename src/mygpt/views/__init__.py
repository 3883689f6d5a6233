"""Charts and pages: one set of JavaScript views (`static/`) for the playground and the reports."""
