package twin

// kernel is what this kernel can make.
type kernel struct{}
