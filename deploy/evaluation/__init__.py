"""`deepretrieval eval`: what a model's answers are worth, beside what simple queries are worth."""
