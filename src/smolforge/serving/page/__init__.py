"""The page at /: index.html, plain JavaScript modules and styles in static/, and the login form.

The page needs no build step and loads nothing from other servers. Its charts are drawn by uPlot, vendored in
`smolforge/report/static` and served next to the page's own files.

    routes.py   what the page's script asks for: writing, time-lapse, training curves
"""
