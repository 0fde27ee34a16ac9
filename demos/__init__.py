"""The studio: `vislr demo`, a page in the browser where adapters are tried, compared, and merged.

=============  ==========================================================================
module         what
=============  ==========================================================================
`app`          the command: config, limits, the server
`page`         the page: where everything stands (gradio)
`handlers`     what its buttons do (gradio)
`view`         what the page shows, as HTML
`studio`       who is there: sessions, and the pipelines that they share
`session`      one user: adapters, pictures, files
`shared`       a pipeline that several sessions use, one at a time
`uploads`      files from outside: named, counted, moved into the session's folder
`runs`         one press of "Generate": methods one after another, progress, stop
`saving`       merged adapters and pipelines as files
=============  ==========================================================================
"""
