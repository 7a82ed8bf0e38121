"""Parts of a detector that are not in the package `detection`: each replaces one of its own."""
