"""Quality of dense models in int8 and int4, to set beside that of sparse ones."""
