"""The rest of the family: parts beside the detectors of the main line, kept out of the way of who reads those first.

Each keeps a contract of `detection.parts` and is given to a builder like a part of your own; nothing in
`detection.models` outside of this folder knows them.
"""
