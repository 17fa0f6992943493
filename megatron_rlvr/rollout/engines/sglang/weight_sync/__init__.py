"""Updates of the weights of running SGLang servers."""
