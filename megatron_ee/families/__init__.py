"""Model families, one file each: ``config.json`` -> ``Architecture``, weight table, shallower configurations."""
