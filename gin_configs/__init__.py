"""The packaged gin files; see `jaxalign.configs` for how they are looked up."""
