"""The HTTP server: OpenAI's completions API for one model, and the pages.

`app` builds the application, `serving` runs it. A request passes through `guards` (host, origin,
API key, size), `requests` (validation), `prompts` (text to tokens), `scheduler` (decodes all rows
in one batch) and `completions` (tokens to text, the response). Long work runs in `threads`;
`playground` serves the pages and their data. `live`, on its own, serves the page of a training in
progress.
"""
