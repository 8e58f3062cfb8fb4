"""The cloud's database: models, transactions, and what is asked of them, one subject a file."""
