"""HTTP: OpenAI's completions API over one model, and what the playground asks for.

`app` puts it together, `serving` runs it. On a request's way: `guards` refuse what may not in,
`requests` says what is wanted, `scheduler` decodes all requests in one batch, `samples` turns
tokens into text, `completions` answers. `reading` looks at prompts, `playground` serves the page.
"""
