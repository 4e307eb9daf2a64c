"""Which mask ratio and patch size make reconstruction learn what a task needs?"""
