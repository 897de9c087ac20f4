"""Documents of a run (JSON) become pages for people.

page.py           what a page is made of: sections of tables, pictures, listings
compression.py    the document of compress, quantize, sparsify and pack as a page
training.py       the document of distill as a page, and its model card
comparison.py     several outputs of one model on a page: quality against size
usage.py          the commands at the head of a model card
speed.py          what `bench` measured, as a section
pictures.py       the pictures, drawn once for wide and once for narrow screens
markdown.py       a page as Markdown, without its pictures
html.py           a page as one HTML file that needs nothing else

The stages that make those documents (evaluate, distill, bench) know nothing of each other and meet here, in JSON.
"""
