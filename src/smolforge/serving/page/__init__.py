"""The page at /.

page.py      Gradio: layout, controls, tabs; the seed project's app and beyond
static/      our own script and styles: tokens as they come, their probabilities, branches, charts
write.py     what the script reads while text is written; timelapse.py: the same prompt through a run's checkpoints
training.py  a run's curves and samples from its files; assets.py: the static files, by name
"""
