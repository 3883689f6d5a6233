"""Pictures and pages: one set of views (`static/`), used by the playground and by reports."""
