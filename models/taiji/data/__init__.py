"""Data: emoji with Chinese names, a generated world of coloured shapes and its exact judge."""
