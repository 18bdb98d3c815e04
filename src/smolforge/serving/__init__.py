"""One model behind one port: a page for people, and the API that OpenAI's clients speak.

A request passes `security` (host, origin, key, body limits), is checked by `schemas`, and reaches its route. The
route hands token ids to `EngineThread.submit`; the thread owns the engine, runs it step by step, and brings steps
back to the event loop, where `streaming` turns them into text or server-sent events. A client that disconnects
cancels its request before the next step. A run that is still training is followed: each newer checkpoint replaces
the served model while running requests finish on the old one. The files, in the order to read them:

    settings.py        the settings of a server, checked before anything starts
    server.py          the process: binds the port, runs the app, handles signals
    app.py             create_app: routes and middleware; loads and follows the model; /v1/models, /health, /metrics
    security.py        middleware: host, origin, API key, body limits; the login of the page
    errors.py          every error in OpenAI's shape
    schemas.py         what clients can send
    structured.py      response_format and tools: the grammar of an answer, and the calls in it
    openai_routes.py   completions, chat, tokenize: all answers
    responses_routes.py  /v1/responses: a chat as items and events
    state.py           what routes share: model source, metrics, limits
    engine_thread.py   the thread that owns the engines; a request as the event loop sees it
    streaming.py       transcripts and server-sent events
    page_routes.py     the page (page/: HTML, plain JavaScript) and what its script asks for
    sidecar.py         a server next to a training: train --serve
    load_test.py       bench serve: tokens/s and waiting time under load
"""
