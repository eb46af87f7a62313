EXERCISES: tuple = ()
