//! stub
pub fn is_fused_attention(_d: &str, op: &str) -> bool {
    op == "Attention"
}
