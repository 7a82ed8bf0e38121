"""The page that looks at images with a trained detector. `study` needs no more than the package; the page NiceGUI."""
